"""AdaMM."""
