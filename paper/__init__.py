"""The paper: its text, and the code that makes every number, table and figure in it from paper/results."""
