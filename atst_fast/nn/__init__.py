"""Drop-in modules: parameters and buffers with the official state-dict keys, no maths of their own."""
