"""What models are made of and how they are run: weights, attention, generation, scoring, devices."""
