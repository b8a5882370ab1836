"""The Flower app that both sides of the SuperLink benchmark run."""
