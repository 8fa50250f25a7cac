"""Training a policy against a reward model: samples, rewards, advantages, the loss, what is kept, how good it is."""
