"""From a decoder to tokens and text: sampling, replay of steps, generation, the pipeline."""
