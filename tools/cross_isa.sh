#!/usr/bin/env bash
# Runs the digest matrix of every class E strategy on other instruction sets and another build of torch; all cells must
# be equal.
#
# RULES
# - Runs on an x86-64 Debian with the environment of `make test`; nothing is installed, no root, no chroot, no binfmt.
#   What is fetched lies in .cross/ (about 3 GB): Debian packages, unpacked, and wheels. A part that is there is kept.
# - aarch64 runs under qemu's user emulation: the PyPI build of torch, as cortex-a76 (NEON), `max`, and with SVE of 256
#   bits. The second x86 build is Debian's: another compiler, BLAS and version of torch, and another numpy and Python.
# - Only the definition runs there (torch, no numba); on this machine the fused kernels have a column of their own.
# - All columns run one copy of the source, so that editing meanwhile changes nothing.
# - One column that cannot be made does not stop the others, but it is said and the exit status is 2.
#   Exit 1: a cell differs. Exit 0: all columns ran and all cells are equal.
#
# Example: JOBS=4 tools/cross_isa.sh [COLUMN...]   (x86-default x86-avx2 x86-avx512 x86-numba x86-debian
#                                              aarch64-a76 aarch64-max aarch64-sve256)

set -u
cd "$(dirname "$0")/.." || exit 2
HERE=$PWD
PYTHON=$HERE/.venv/bin/python
CROSS=$HERE/.cross
SOURCE=$CROSS/source
DRIVER=$SOURCE/tools/cross_isa_driver.py
ALL="x86-default x86-avx2 x86-avx512 x86-numba x86-debian aarch64-a76 aarch64-max aarch64-sve256"
COLUMNS=${*:-$ALL}

TORCH_ARM=torch==2.10.0 # a CPU wheel; later ones for aarch64 are CUDA builds
OUR_NEEDS="blake3 msgpack pydantic pydantic-core annotated-types typing-extensions typing-inspection scipy threadpoolctl"
TORCH_NEEDS="numpy mpmath filelock sympy networkx jinja2 markupsafe fsspec"

say() { printf 'cross: %s\n' "$*" >&2; }

# quietly WHAT COMMAND...: runs it; when it fails, says what and shows the end of its output.
quietly() {
    local what=$1 output
    shift
    output=$("$@" 2>&1) && return 0
    say "$what failed: $(printf '%s\n' "$output" | tail -n 2 | tr '\n' ' ')"
    return 1
}

# debian NAME SUITE ARCHITECTURE PACKAGE...: the packages and all they need, unpacked into .cross/NAME.
debian() {
    local root=$CROSS/$1 suite=$2 arch=$3 state=$CROSS/apt-$1 package
    [ -e "$root/.whole" ] && return 0
    say "fetching Debian $suite $arch: ${*:4}"
    rm -rf "$root" "$state"
    mkdir -p "$root" "$state/lists/partial" "$state/cache/archives/partial"
    : >"$state/status"
    echo "deb http://deb.debian.org/debian $suite main" >"$state/sources.list"
    local options="-oAPT::Architecture=$arch -oAPT::Architectures=$arch -oDir::Etc::sourcelist=$state/sources.list
        -oDir::Etc::sourceparts=$state/none -oDir::State=$state -oDir::State::status=$state/status
        -oDir::State::Lists=$state/lists -oDir::Cache=$state/cache -oDebug::NoLocking=1 -oAcquire::Languages=none
        -oAPT::Install-Recommends=0 -oAPT::Sandbox::User=root -oAPT::Get::AllowUnauthenticated=0"
    # shellcheck disable=SC2086
    quietly "apt-get update ($suite $arch)" apt-get $options update || return 1
    # shellcheck disable=SC2086
    quietly "apt-get ($suite $arch)" apt-get $options -y --download-only install "${@:4}" || return 1
    for package in "$state"/cache/archives/*.deb; do
        quietly "unpacking ${package##*/}" dpkg-deb -x "$package" "$root" || return 1
    done
    rm -rf "$state" "$root/usr/share/doc" "$root/usr/share/locale" "$root/usr/share/man"
    touch "$root/.whole"
}

# wheels NAME PYTHON-VERSION PLATFORM PACKAGE...: wheels for another machine, unpacked into .cross/NAME.
wheels() {
    local place=$CROSS/$1 version=$2 machine=$3 platforms=""
    [ "$(cat "$place/.whole" 2>/dev/null)" = "$*" ] && return 0
    say "fetching wheels for Python $version on $machine: ${*:4}"
    rm -rf "$place"
    for tag in manylinux_2_28 manylinux_2_17 manylinux2014; do platforms="$platforms --platform ${tag}_$machine"; done
    # shellcheck disable=SC2086
    quietly "pip ($machine)" "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
        --only-binary=:all: $platforms --python-version "$version" --implementation cp --target "$place" "${@:4}" ||
        return 1
    printf '%s' "$*" >"$place/.whole"
}

# as_here PACKAGE...: the packages in the versions of the environment of `make test`.
as_here() {
    "$PYTHON" -c 'import sys
from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in sys.argv[1:]))' "$@"
}

# fetched COLUMN: what the column needs lies in .cross/.
fetched() {
    # shellcheck disable=SC2046,SC2086
    case $1 in
    x86-debian)
        debian x86-debian trixie amd64 python3-torch && wheels x86-debian-site 3.13 x86_64 $(as_here $OUR_NEEDS)
        ;;
    aarch64-*)
        debian qemu bookworm amd64 qemu-user-static &&
            debian arm64 bookworm arm64 python3-minimal libpython3-stdlib libgomp1 libstdc++6 libgfortran5 &&
            wheels arm64-site 3.11 aarch64 $TORCH_ARM $(as_here $OUR_NEEDS $TORCH_NEEDS)
        ;;
    x86-avx512) grep -qm1 avx512vl /proc/cpuinfo || { say "$1: this processor has no AVX-512" && return 1; } ;;
    x86-*) ;;
    *) say "no column is called $1; there are: $ALL" && return 1 ;;
    esac
}

# here COLUMN VARIABLE=VALUE...: the driver in the environment of `make test`.
here() { env PYTHONPATH="$SOURCE" "${@:2}" "$PYTHON" "$DRIVER" run "$1" "$CROSS/cases.json"; }

# debians COLUMN: the driver with Debian's torch, Python and loader.
debians() {
    local root=$CROSS/x86-debian libraries=$CROSS/x86-debian/usr/lib/x86_64-linux-gnu
    env PYTHONHOME="$root/usr" CRDTMERGE_KERNELS=torch \
        PYTHONPATH="$SOURCE:$CROSS/x86-debian-site:$root/usr/lib/python3/dist-packages" \
        "$root/usr/lib64/ld-linux-x86-64.so.2" \
        --library-path "$libraries:$libraries/blas:$libraries/lapack:$root/usr/lib" \
        "$root/usr/bin/python3.13" "$DRIVER" run "$1" "$CROSS/cases.json"
}

# emulated COLUMN PROCESSOR: the driver with the aarch64 wheel of torch on that processor.
emulated() {
    local root=$CROSS/arm64
    "$CROSS/qemu/usr/bin/qemu-aarch64-static" -cpu "$2" -L "$root" -E CRDTMERGE_KERNELS=torch \
        -E LD_LIBRARY_PATH="$root/usr/lib/aarch64-linux-gnu" -E PYTHONHOME="$root/usr" \
        -E PYTHONPATH="$SOURCE:$CROSS/arm64-site" "$root/usr/bin/python3.11" "$DRIVER" run "$1" "$CROSS/cases.json"
}

# column NAME: the cells of one column, in .cross/NAME.json once they are all there.
column() {
    case $1 in
    x86-default) here "$1" CRDTMERGE_KERNELS=torch ATEN_CPU_CAPABILITY=default ;;
    x86-avx2) here "$1" CRDTMERGE_KERNELS=torch ATEN_CPU_CAPABILITY=avx2 ;;
    x86-avx512) here "$1" CRDTMERGE_KERNELS=torch ATEN_CPU_CAPABILITY=avx512 ;;
    x86-numba) here "$1" CRDTMERGE_KERNELS=numba ;;
    x86-debian) debians "$1" ;;
    aarch64-a76) emulated "$1" cortex-a76 ;;
    aarch64-max) emulated "$1" max ;;
    aarch64-sve256) emulated "$1" max,sve256=on ;;
    esac >"$CROSS/$1.partial" && mv "$CROSS/$1.partial" "$CROSS/$1.json"
}

export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
rm -rf "$SOURCE"
mkdir -p "$SOURCE"
cp -a crdtmerge tests tools "$SOURCE" # with what numba compiled here, by its times
PYTHONPATH="$SOURCE" "$PYTHON" "$DRIVER" cases "$CROSS/cases.json" || exit 2
for name in $COLUMNS; do
    rm -f "$CROSS/$name.json"
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-$(nproc)}" ]; do sleep 1; done
    fetched "$name" && column "$name" &
    [ -d "$CROSS/arm64-site/torch" ] || wait # two columns must not fetch the same
done
wait
made="" status=0
for name in $COLUMNS; do
    if [ -e "$CROSS/$name.json" ]; then made="$made $name"; else say "$name: NOT run" && status=2; fi
done
# shellcheck disable=SC2086
[ -n "$made" ] && { PYTHONPATH="$SOURCE" "$PYTHON" "$DRIVER" table "$CROSS" $made || status=$?; }
exit $status
