"""What vLLM is told by name: its workers, drafter and scheduler of ours; and names of vLLM's own
that several of our modules know. Imports nothing."""

#: Key of ``additional_config`` that carries the validated config to every worker.
CONFIG_KEY = "specplus"
DRAFTER = "vllm_specplus.engine.drafter.Drafter"
SCHEDULER = "vllm_specplus.engine.scheduler.GuardedScheduler"
#: Workers by device type: of a method, of a model of captions, of a model of latents.
WORKERS = {
    "cpu": "vllm_specplus.engine.worker.TreeCPUWorker",
    "cuda": "vllm_specplus.engine.worker.TreeGPUWorker",
}
CAPTION_WORKERS = {
    "cpu": "vllm_specplus.engine.worker.ImageCPUWorker",
    "cuda": "vllm_specplus.engine.worker.ImageGPUWorker",
}
LATENTS_WORKERS = {
    "cpu": "vllm_specplus.engine.worker.LatentsCPUWorker",
    "cuda": "vllm_specplus.engine.worker.LatentsGPUWorker",
}
