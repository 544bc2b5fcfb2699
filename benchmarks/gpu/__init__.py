"""What a GPU does with the library: parity, ops, a training step and decoding, in one run of minutes."""
