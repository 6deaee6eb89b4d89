"""The training loop and everything that keeps a run alive. The only room that imports deepspeed."""
