"""The command line of transformers, whose models have fastgpt's attention in place of PyTorch's:

python -m fastgpt.integrations.transformers serve MODEL --continuous-batching
"""

from transformers.cli.transformers import main

from fastgpt.integrations.transformers.registration import register

if __name__ == "__main__":
    register("sdpa")
    main()
