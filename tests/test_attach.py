"""How pipelines get their methods: in every order of imports, with every kind of loader."""

import subprocess
import sys
import textwrap
import zipfile

import diffusers
import pytest
import tiny
import torch
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

import fastdit

STAND_IN = {
    "diffusers/__init__.py": "from .pipelines import pipeline_utils, after\n",
    "diffusers/pipelines/__init__.py": "",
    "diffusers/pipelines/pipeline_utils.py": "class DiffusionPipeline: pass\n",
    "diffusers/pipelines/after.py": "value = 1\n",
    "diffusers/modular_pipelines/__init__.py": "",
    "diffusers/modular_pipelines/modular_pipeline.py": "class ModularPipeline: pass\n",
}
UTILS = "sys.modules['diffusers.pipelines.pipeline_utils']"
ATTACHED = f"assert isinstance({UTILS}.DiffusionPipeline.sparse_attention, property)"


@pytest.fixture
def run(tmp_path):
    """Run code in a process of its own that finds a stand-in for diffusers; return how it failed."""

    def run(code, zipped=False, **changes):
        files = {**STAND_IN, **changes}
        place = tmp_path / ("packages.zip" if zipped else "packages")
        if zipped:
            with zipfile.ZipFile(place, "w") as file:
                for name, text in files.items():
                    file.writestr(name, text)
        else:
            for name, text in files.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_text(text)
        whole = f"import sys\nplace = {str(place)!r}\nsys.path.insert(0, place)\n" + textwrap.dedent(code)
        done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else ""

    return run


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_any_loader(run, zipped):
    """The loader of a zip file is one object for all of its modules."""
    failure = run(
        f"""
        import fastdit, diffusers, importlib
        assert diffusers.pipelines.after.value == 1
        {ATTACHED}
        module = {UTILS}
        assert module.__spec__.loader is module.__loader__ and "fastdit" not in repr(type(module.__loader__))
        importlib.reload(diffusers.pipelines.after)
        """,
        zipped,
    )
    assert not failure


def test_reloaded(run):
    code = "import fastdit, diffusers, importlib\nimportlib.reload(diffusers.pipelines.pipeline_utils)"
    failure = run(f"{code}\n{ATTACHED}")
    assert not failure


def test_modular_pipelines(run):
    code = "assert isinstance(module.ModularPipeline.sparse_attention, property)"
    module = "from diffusers.modular_pipelines import modular_pipeline as module"
    failure = run(f"import fastdit\n{module}\n{code}")
    assert not failure
    failure = run(f"{module}\nimport fastdit\n{code}")
    assert not failure


def test_an_import_that_fails_at_first(run):
    failure = run(
        f"""
        import fastdit
        try:
            import diffusers
        except ImportError:
            sys.ready = True
        import diffusers
        {ATTACHED}
        """,
        **{
            "diffusers/pipelines/pipeline_utils.py": "import sys\nif not hasattr(sys, 'ready'): raise ImportError\n"
            "class DiffusionPipeline: pass\n"
        },
    )
    assert not failure


def test_imported_by_a_thread_meanwhile(run):
    failure = run(
        f"""
        import threading
        sys.begun = threading.Event()
        thread = threading.Thread(target=__import__, args=("diffusers",))
        thread.start()
        sys.begun.wait()
        import fastdit
        thread.join()
        import diffusers
        {ATTACHED}
        """,
        **{
            "diffusers/pipelines/pipeline_utils.py": "import sys, time\nsys.begun.set()\ntime.sleep(0.5)\n"
            "class DiffusionPipeline: pass\n"
        },
    )
    assert not failure


def test_a_finder_that_asks_all_finders(run):
    failure = run(
        f"""
        import fastdit

        class Asking:
            def find_spec(self, name, path, target=None):
                if name.endswith("pipeline_utils"):
                    for finder in sys.meta_path:
                        spec = None if finder is self else finder.find_spec(name, path, target)
                        if spec is not None:
                            return spec

        sys.meta_path.insert(0, Asking())
        import diffusers
        {ATTACHED}
        """
    )
    assert not failure


def test_a_modular_pipeline_runs_sparse():
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"has no transformer.*load_components\(\)"):
        pipe.enable_sparse_attention()
    pipe.update_components(transformer=tiny.transformer("wan"), scheduler=scheduler)

    def run():
        noise = torch.Generator().manual_seed(0)
        texts = {f"{name}prompt_embeds": torch.randn(1, 12, 32, generator=noise) for name in ("", "negative_")}
        size = {"height": 128, "width": 128, "num_frames": 5}
        return pipe(**texts, **size, num_inference_steps=3, generator=noise, output="latents")

    expected = run()
    recorder = tiny.Recorder()
    pipe.enable_sparse_attention(recorder, schedule=fastdit.Schedule(warmup_steps=1))
    torch.testing.assert_close(run(), expected)
    calls = [(call.step, call.num_steps, call.branch) for call in recorder.calls if call.layer == 0]
    assert calls == [(step, 3, branch) for step in (1, 2) for branch in ("cond", "uncond")]
    pipe.disable_sparse_attention()
    assert pipe.sparse_attention is None and torch.equal(run(), expected)
