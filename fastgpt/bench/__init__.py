"""`fastgpt bench`: its cases, the roofline of the machine, and timing."""
