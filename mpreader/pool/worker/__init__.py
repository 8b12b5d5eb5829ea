"""The worker process: receives parts of objects into shared memory. Imports nothing else of mpreader."""
