#!/usr/bin/env bash
# Serve a model that completes Python, drafting from the standard library.
set -euo pipefail
model=${1:-$(vllm-specplus prepare-model)}
store=${STORE:-${XDG_CACHE_HOME:-$HOME/.cache}/vllm-specplus/stdlib-$(basename "$model")}

if ! vllm-specplus datastore info "$store" >/dev/null 2>&1; then
    rm -rf "$store.part"  # of a build that was interrupted
    library=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    # Modules of the library itself; its tests and what is installed beside it stay out.
    find "$library" -name '*.py' -not -path '*/site-packages/*' -not -path '*/dist-packages/*' \
        -not -path '*/test/*' -not -path '*/tests/*' -not -path '*/idlelib/*' -print0 | sort -z |
        xargs -0 vllm-specplus datastore build "$store.part" --tokenizer "$model"
    mv "$store.part" "$store"
fi

exec vllm serve "$model" --served-model-name code --port "${PORT:-8000}" --max-model-len 2048 \
    --speculative-config '{
        "method": "rasd",
        "sources": ["token_recycling", "suffix_tree", {"method": "rest", "datastore": "'"$store"'"}]
    }'
