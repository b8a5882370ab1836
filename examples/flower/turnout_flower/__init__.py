"""Turnout's strategies and clients as an ordinary Flower app."""
