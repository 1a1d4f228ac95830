"""Running a model over subsets of the modalities of its cases, and the table of results."""
