"use strict";
// Image ids are foreign text: they go into the page as text nodes and into maps, never into markup or plain objects.
const { audit, images } = JSON.parse(document.getElementById("data").textContent);
const KEY = "pukd-audit-" + audit;
const LABELS = ["yes", "no", "unsure"];
const KEYS = { y: "yes", n: "no", u: "unsure" };
const labels = new Map(); // image id -> label
const byId = (id) => document.getElementById(id);
let at = 0;
let keeps = true; // whether the browser remembers
let saved = true; // whether all labels are in a file

function load() {
  try {
    const ids = new Set(images.map(([id]) => id));
    for (const [id, label] of JSON.parse(localStorage.getItem(KEY) || "[]")) {
      if (ids.has(id) && LABELS.includes(label)) labels.set(id, label);
    }
  } catch {
    keeps = false;
  }
  saved = labels.size === 0;
}

function keep() {
  try {
    localStorage.setItem(KEY, JSON.stringify([...labels]));
    keeps = true;
  } catch {
    keeps = false;
  }
}

function pictureOf(i, node) {
  const [, uri] = images[i];
  const shown = document.createElement(uri ? "img" : "span");
  if (uri) {
    shown.alt = "";
    shown.onload = () => shown.classList.toggle("small", shown.naturalWidth <= 96);
    shown.src = uri;
  } else {
    shown.className = "none";
    shown.textContent = "cannot be shown";
  }
  node.replaceChildren(shown);
}

function count() {
  const unsure = [...labels.values()].filter((label) => label === "unsure").length;
  byId("count").textContent = `${labels.size} of ${images.length} labelled` + (unsure ? `, ${unsure} unsure` : "");
  byId("bar").style.width = (100 * labels.size) / images.length + "%";
  byId("kept").textContent = keeps ? "kept in this browser" : "this browser keeps nothing: save before you close it";
}

function show(i) {
  at = Math.min(Math.max(i, 0), images.length - 1);
  const [id] = images[at];
  pictureOf(at, byId("stage"));
  byId("id").textContent = `${at + 1} · ${id}`;
  for (const button of document.querySelectorAll("[data-label]")) {
    button.setAttribute("aria-pressed", String(labels.get(id) === button.dataset.label));
  }
  byId("back").disabled = at === 0;
  byId("next").disabled = at === images.length - 1;
  count();
}

function answer(label) {
  labels.set(images[at][0], label);
  saved = false;
  keep();
  say(labels.size === images.length ? "All images are labelled. Save the file and read it with the audit command." : "");
  show(at + 1);
}

function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

function overview(open) {
  byId("overview").hidden = !open;
  byId("desk").hidden = open;
  byId("switch").firstChild.textContent = open ? "One by one" : "Overview";
  if (!open) return show(at);
  byId("overview").replaceChildren(
    ...images.map(([id], i) => {
      const button = document.createElement("button");
      const frame = document.createElement("span");
      const label = labels.get(id) || "";
      pictureOf(i, frame);
      button.type = "button";
      button.className = label;
      button.title = id;
      button.append(frame, `${i + 1} ${label}`);
      button.onclick = () => {
        at = i;
        overview(false);
      };
      return button;
    }),
  );
}

function save() {
  const text = JSON.stringify({ audit, labels: Object.fromEntries(labels) }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `labels-${audit}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  saved = true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const single = byId("overview").hidden;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "g" || (key === "Escape" && !single)) overview(single);
  else if (!single) return;
  else if (KEYS[key]) event.repeat || answer(KEYS[key]); // a key that is held down is one answer
  else if (key === "ArrowLeft" || key === "Backspace") show(at - 1);
  else if (key === "ArrowRight") show(at + 1);
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-label]")) {
  button.onclick = () => answer(button.dataset.label);
}
byId("back").onclick = () => show(at - 1);
byId("next").onclick = () => show(at + 1);
byId("switch").onclick = () => overview(byId("overview").hidden);
byId("save").onclick = save;
window.addEventListener("beforeunload", (event) => {
  if (!keeps && !saved) event.preventDefault();
});

load();
show(Math.max(0, images.findIndex(([id]) => !labels.has(id))));
