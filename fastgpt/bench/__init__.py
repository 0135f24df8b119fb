"""What `fastgpt bench` measures, the limits of machines, and timing."""
