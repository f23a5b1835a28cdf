"""Images, training, evaluation and figures: what the commands need around the models."""
