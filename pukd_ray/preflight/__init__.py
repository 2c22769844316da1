"""Everything about a config that can be checked before Ray starts, all faults in one go.

`document` reads and writes YAML, `faults` says in prose what pydantic finds, `files` looks at what the config names,
`loading` puts them together.
"""

from pukd_ray.preflight.document import parse_value, to_yaml
from pukd_ray.preflight.files import check_folder
from pukd_ray.preflight.loading import config_of_run, load, load_config, load_teacher_training

__all__ = ["check_folder", "config_of_run", "load", "load_config", "load_teacher_training", "parse_value", "to_yaml"]
