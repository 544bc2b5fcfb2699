"""The serving engine and the server in front of it: exactness, speed, what tracing costs, and a long hard day."""
