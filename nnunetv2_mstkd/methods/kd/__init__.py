"""Plain knowledge distillation."""
