"""mmFormer: transformers within and between modalities."""
