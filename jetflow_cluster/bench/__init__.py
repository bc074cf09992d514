"""Measurements and pictures: every system on the same prompts, in one run, with JSON and a picture at the end."""
