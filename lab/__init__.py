"""The paper again: the tiny encoder pre-trained, many runs, claims, figures, report."""
