"""What merging buys: rotated digits, and language models of three domains; one JSON file an experiment."""
