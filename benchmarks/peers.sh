#!/usr/bin/env bash
# Makes the environments of the peers that the benchmark runs beside us: .peers/mergekit and .peers/crdt-merge.
#
# RULES
# - Exact versions, the ones that were seen to work together; an environment with the same list is left as it is.
# - torch comes first and pinned, so that nothing that needs "torch" fetches another one. Where the registry's wheel of it
#   is the CUDA build and you want the small one, point pip at a CPU wheel (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL).
# - mergekit goes in without its needs: it pins older versions of some of them, and `datasets` is not needed to merge.
# - One peer that cannot be made does not stop the other; the benchmark says "not available" for it. Exit 1 then.
#
# Example: benchmarks/peers.sh && .venv/bin/python -m benchmarks.merge --size mid

set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-.venv/bin/python}

TORCH=torch==2.13.0
MERGEKIT=mergekit==0.1.4
MERGEKIT_NEEDS="
transformers==5.3.0 pydantic==2.10.6 click==8.2.1 accelerate==1.15.0 immutables==0.21 peft==0.21.2 tokenizers==0.22.2
sentencepiece==0.2.3 protobuf==7.36.2 scipy==1.17.1 huggingface_hub==1.16.1 tqdm==4.70.1 safetensors==0.8.0 numpy==2.4.6
PyYAML==6.0.3 typing_extensions==4.16.0"
# Later versions of transformers import well and then break in the first merge: pydantic cannot complete this class.
MERGEKIT_WORKS="from mergekit.architecture import ConfiguredModuleArchitecture as A; assert A.__pydantic_complete__"
CRDT_MERGE="crdt-merge==0.11.0 numpy==2.4.6 safetensors==0.8.0"

say() { printf 'peers: %s\n' "$*"; }

# step WHAT COMMAND...: runs it quietly; when it fails, says what and shows the end of its output.
step() {
    local what=$1 output
    shift
    output=$("$@" 2>&1) && return 0
    say "$what failed: $(printf '%s\n' "$output" | grep -v '^WARNING' | tail -n 1)"
    return 1
}

# install ENV ARGUMENTS...: one pip call in that environment.
install() {
    local place=$1
    shift
    step "$place: pip install $*" "$place/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

fill_mergekit() {
    # shellcheck disable=SC2086
    install "$1" $TORCH && install "$1" --no-deps $MERGEKIT && install "$1" $TORCH $MERGEKIT_NEEDS &&
        step "$1: mergekit with these versions" "$1/bin/python" -c "$MERGEKIT_WORKS"
}

fill_crdt_merge() {
    # shellcheck disable=SC2086
    install "$1" $TORCH && install "$1" $TORCH $CRDT_MERGE &&
        step "$1: import" "$1/bin/python" -c "from crdt_merge.model.crdt_state import CRDTMergeState"
}

# make_peer NAME PINS FILL: the environment .peers/NAME, made once for one list of pins.
make_peer() {
    local place=.peers/$1 pins=$2 fill=$3
    if [ "$(cat "$place/pins.txt" 2>/dev/null)" = "$pins" ]; then
        say "$1: already made ($place)"
        return 0
    fi
    say "$1: making $place, this takes minutes"
    if step "$1: venv" "$PYTHON" -m venv --clear "$place" && "$fill" "$place"; then
        printf '%s\n' "$pins" >"$place/pins.txt"
        say "$1: made ($place)"
        return 0
    fi
    say "$1: NOT made; the benchmark will say \"not available\" for it"
    return 1
}

mkdir -p .peers
status=0
make_peer mergekit "$TORCH $MERGEKIT $MERGEKIT_NEEDS" fill_mergekit || status=1
make_peer crdt-merge "$TORCH $CRDT_MERGE" fill_crdt_merge || status=1
exit $status
