"""Vision functions: their probe pairs and how an answer is judged."""
