"""How well models learn: other people's tasks, peers at equal size, and what the memory and the experts do."""
