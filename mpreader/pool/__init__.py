"""The pool: worker processes that receive parts of objects into shared memory, and their coordinator."""
