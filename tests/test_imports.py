"""Imports point one way, and what is optional or slow to load is loaded late."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt

PACKAGE = Path(fastgpt.__file__).parent

# A module imports only what stands below it. Those on one line do not import each other.
LAYERS = [
    {"__main__"},
    {"cli.main"},
    {
        "cli.bench",
        "cli.chat",
        "cli.embed",
        "cli.fill",
        "cli.generate",
        "cli.info",
        "cli.inspect",
        "cli.quantize",
        "cli.train",
    },
    {"cli.draft"},
    {"cli.arguments", "cli.example_calls", "cli.output", "cli.prompts"},
    {"training.loop"},
    {"bench.suite", "__init__", "parallel", "training.trainer"},
    {"pipelines"},
    {"generation.pipeline", "encoding.pipeline"},
    {"encoding.sentences"},
    {"generation.conversation"},
    {"model.classifiers", "training.corpus", "training.evaluation", "training.run_folder", "training.state"},
    {"generation.generate"},
    {"generation.many"},
    {"generation.scheduler"},
    {"generation.request", "training.config", "training.processes"},
    {"generation.batch_size", "generation.config", "generation.slot_sampling", "generation.speculation"},
    {"generation.decoding", "generation.sampling"},
    {"generation.beginnings", "generation.history", "generation.replay", "generation.top_p"},
    {"model.inspection", "bench.timing", "model.encoder_decoder"},
    {"model.encoder"},
    {"model.decoder"},
    {"model.encoder_states", "model.latent", "model.moe", "model.relative_bias"},
    {"model.inputs", "model.layers"},
    {"model.config", "bench.limits"},
    {"checkpoints.gguf_writer", "text.gguf_tokenizer_writer"},
    {"checkpoints.adapters", "checkpoints.gguf"},
    {"checkpoints.gguf_config"},
    {"checkpoints.gguf_architectures", "checkpoints.gguf_tensors"},
    {"checkpoints.transformers_format", "text.gguf_tokenizer"},
    {"checkpoints.quantized_folders"},
    {f"checkpoints.quantized_folders.{name}" for name in ("awq", "compressed_tensors", "gptq", "mxfp4", "own", "torchao")},
    {"checkpoints.quantized_folders.matrix"},
    {"checkpoints.safetensors_files"},
    {"checkpoints.loading"},
    {"text.tokenizer"},
    {"text.tokenizer_files"},
    {"checkpoints.families", "checkpoints.generation_config", "text.chat_template", "text.streaming", "text.vocabularies"},
    {
        f"checkpoints.families.{name}"
        for name in (
            "cohere2",
            "deepseek",
            "gemma",
            "glm4",
            "gpt_neox",
            "gpt_oss",
            "granite",
            "mixtral",
            "modernbert",
            "olmo",
            "phi",
            "phi3",
            "qwen",
            "qwen_moe",
            "smollm3",
            "stablelm",
            "starcoder2",
            "t5",
        )
    },
    {"checkpoints.families.experts", "checkpoints.families.llama"},
    {"checkpoints.families.bert", "checkpoints.families.gpt2", "checkpoints.families.own", "checkpoints.families.rope"},
    {"checkpoints.families.family", "checkpoints.families.fields"},
    {"text.chat_template.sandbox"},
    {"text.chat_template.costs"},
    {"text.chat_template.budget"},
    {"text.chat_template.messages"},
    {"model.evaluation_mode"},
    {"model.fusion", "model.lora", "model.rope"},
    {"checkpoints.files", "checkpoints.gguf_file", "checkpoints.hub"},
    {"folders", "schema"},
    {"cache.create", "cache.packed"},
    {"cache.contiguous", "cache.paged", "cache.sliding", "cache.uncached"},
    {"integrations.flash_provider", "integrations.sdpa"},
    {"integrations.sdpa.dispatcher_hook"},
    {"integrations.sdpa.function"},
    {"integrations.sdpa.refusals"},
    {"integrations.flash_attn"},
    {"integrations.vllm", "integrations.vllm.backend"},
    {"integrations.transformers"},
    {"integrations.transformers.optimize"},
    {"integrations.transformers.layers"},
    {"integrations.transformers.__main__"},
    {"integrations.transformers.registration"},
    {"integrations.transformers.continuous"},
    {"integrations.transformers.attention"},
    {"integrations.transformers.cache", "integrations.transformers.masks"},
    {"integrations.transformers.deferred", "integrations.transformers.recording"},
    {"integrations.paged"},
    {"cache.base"},
    {"cache.storage"},
    {"testing", "testing.__main__"},
    {"testing.attention_parity"},
    {"testing.attention_features", "testing.linear_features", "testing.moe_features", "testing.norm_features"},
    {"ops.explain"},
    {"ops.attention_with_kv_cache", "ops.moe", "ops.route"},
    {"ops.moe_grouped"},
    {"ops.experts"},
    {"ops.attention", "ops.kv_cache_update", "ops.linear", "ops.decode_step"},
    {"ops.attention.autograd", "ops.attention.refusals", "ops.kv_cache_update.refusals"},
    {
        "ops.attention.operators",
        "ops.attention.reference",
        "ops.kv_cache_update.operators",
        "ops.kv_cache_update.reference",
    },  # fmt: skip
    {"ops.attention.checks", "ops.kv_cache_update.checks", "ops.kv_cache_update.overlap"},
    {"ops.attention.call"},
    {"ops.norm", "ops.matrix_product", "ops.prepend_shared"},
    {"kernels.moe_quantized"},
    {"kernels.attention_backward", "kernels.attention_decode", "kernels.linear_quantized", "kernels.moe"},
    {"kernels.attention_backward_bias", "kernels.attention_backward_keys", "kernels.attention_backward_queries"},
    {"kernels.attention_decode_new", "kernels.attention_decode_parts", "kernels.attention_forward", "kernels.linear"},
    {"kernels.attention_arguments"},
    {"kernels.attention_scores"},
    {
        "kernels.attention_rows",
        "kernels.kv_cache_update",
        "kernels.norm",
        "kernels.decode_step",
        "ops.implementations",
    },  # fmt: skip
    {"kernels.tiles", "ops.quantized_weight"},
    {"ops.library", "huge_pages"},
    {
        "ops.gguf_blocks",
        "checks",
        "kernels.architecture",
        "kernels.limits",
        "kernels.dependent_launch",
        "kernels.launch",
        "ops.dropout",
        "ops.derivatives",
        "ops.quantization",
        "startup",
    },  # fmt: skip
    {
        "_C",
        "bench",
        "cache",
        "checkpoints",
        "cli",
        "encoding",
        "generation",
        "integrations",
        "kernels",
        "model",
        "ops",
        "testing.draws",
        "testing.numerics",
        "text",
        "training",
    },  # fmt: skip,
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported(path: Path):
    """The package's own modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written absolutely"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            assert top not in ("tests", "benchmarks"), f"{path} imports {name}"
            if top == "fastgpt":
                while rest and rest not in LEVEL:  # a name inside a module
                    rest = rest.rpartition(".")[0]
                yield rest or "__init__"


@pytest.mark.slow
def test_imports_point_downwards():
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        importer = module_name(path)
        assert importer in LEVEL, f"{path} has no layer: add it to LAYERS"
        for name in imported(path):
            assert LEVEL[name] > LEVEL[importer], f"{importer} imports {name}"


def private_names_read(path: Path):
    """Yields each _name of another file of the package or the benchmarks that a file imports, or reads off a module."""
    tree, modules = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if is_module(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("fastgpt", "benchmarks"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if is_module(name):
                    modules.add(alias.asname or alias.name)
                elif alias.name.startswith("_"):
                    yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and ast.unparse(node.value) in modules - {"_C"}:
            name = ast.unparse(node)
            if not (node.attr.startswith("__") or name == "fastgpt._C"):
                yield name


def is_module(name: str) -> bool:
    """Whether that is a file or folder of the package or the benchmarks, or the compiled library."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.split(".")[0] in ("fastgpt", "benchmarks") and (
        path.is_dir() or path.with_suffix(".py").exists() or name == "fastgpt._C"
    )


@pytest.mark.parametrize("folder", ("fastgpt", "benchmarks"))
def test_what_is_private_stays_in_its_file(folder):
    """No file imports another's _name, or reads one off a module."""
    read = {str(path): names for path in (PACKAGE.parent / folder).rglob("*.py") if (names := list(private_names_read(path)))}
    assert not read


def test_private_names_of_other_files_are_found(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "import fastgpt.ops.norm, fastgpt.kernels.tiles as t\nfrom fastgpt import _C\nfrom fastgpt.kernels import norm\n"
        "from benchmarks.report import _one\nprint(_one, norm._two, fastgpt.ops.norm._three, t._four, _C._five, t.__doc__)\n"
    )
    assert list(private_names_read(path)) == ["benchmarks.report._one", "norm._two", "fastgpt.ops.norm._three", "t._four"]


def test_integrations_see_operations_and_caches_only():
    for path in (PACKAGE / "integrations").rglob("*.py"):
        for name in imported(path):
            assert name in ("cache.base", "checks", "huge_pages") or name.partition(".")[0] in ("integrations", "ops"), (
                f"{path} imports {name}"
            )


@pytest.mark.slow
def test_nothing_optional_is_imported():
    """Beyond what torch imports itself."""
    program = "import sys, torch; before = set(sys.modules); import fastgpt; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "fastgpt" in loaded
    assert not loaded & {"triton", "transformers", "tokenizers", "tqdm", "matplotlib", "gguf"}


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["--help", "info"])
def test_a_command_loads_what_it_needs(argument):
    """Beyond what torch imports itself: it starts as soon as that is there."""
    program = (
        "import sys, torch; before = set(sys.modules)\nfrom fastgpt.cli.main import main\n"
        f"try:\n    main([{argument!r}])\nexcept SystemExit:\n    pass\nprint(*(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.splitlines()[-1].split()}
    assert "fastgpt" in loaded and not loaded & {"tokenizers", "tqdm", "jinja2"}
