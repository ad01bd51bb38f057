"""The thin training loop: data, step, schedule, checkpoint and the command line."""
