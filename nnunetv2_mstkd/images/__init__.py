"""Reading images, their geometry and completeness, and writing files atomically."""
