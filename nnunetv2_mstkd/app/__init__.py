"""A page in the browser that segments a case from the sequences it has: ``mstkd app``."""
