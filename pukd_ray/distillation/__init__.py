"""The student: class weights, worst-case weights, robust knowledge distillation."""
