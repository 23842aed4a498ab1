"""Right and wrong solutions of each task, for `check`: {name: {function: text}}; EQUIVALENT mutants with reasons."""
