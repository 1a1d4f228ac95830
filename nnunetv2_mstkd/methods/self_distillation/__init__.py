"""Self-distillation: the model's own prediction from all modalities is its teacher."""
