#!/usr/bin/env bash
# Compiles the tests and the server with the feature `cuda` on a machine without a GPU or a CUDA installation.
#
#   tools/check_cuda.sh [--release] [--toolchain-only]
#
# The toolchain (nvcc, headers, libraries) comes from PyPI and is laid out under target/cuda-toolchain; a stub stands in
# for the driver at link time. Compiling takes an hour or more on two cores. CUDA_COMPUTE_CAP chooses the GPU (default
# 90: H100 and H200); CARGO_TARGET_DIR the build folder (default target/cuda). Needs Python 3.10 or later, gcc, cargo.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=() toolchain_only=no
for argument in "$@"; do
    case $argument in
        --release) profile=(--release) ;;
        --toolchain-only) toolchain_only=yes ;;
        *) sed -n '2,8p' "$0" >&2; exit 2 ;;
    esac
done

base=$PWD/target/cuda-toolchain
toolkit=$base/toolkit
packages=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35
)

# Links the wheels' files into the layout of an installed CUDA toolkit.
lay_out() {
    local wheels=$1 file name
    rm -rf "$toolkit"
    mkdir -p "$toolkit/lib64/stubs"
    ln -s "$wheels/bin" "$wheels/include" "$wheels/nvvm" "$toolkit/"
    for file in "$wheels"/lib/*; do
        name=$(basename "$file")
        ln -sf "$file" "$toolkit/lib64/$name"
        # The linker asks for the name without a version.
        case $name in *.so.*) ln -sf "$file" "$toolkit/lib64/${name%%.so.*}.so" ;; esac
    done
    ln -s lib64 "$toolkit/lib"
}

# A libcuda.so with every function of cuda.h and no bodies: the linker needs the names, the GPU machine has the driver.
make_driver_stub() {
    local header=$toolkit/include/cuda.h source=$toolkit/lib64/stubs/cuda_stub.c names
    # `cuda.h` renames functions to versioned ones; both spellings are exported.
    names=$({ gcc -E -I"$toolkit/include" "$header"; gcc -E -D__CUDA_API_VERSION_INTERNAL -I"$toolkit/include" "$header"
              cat "$header"; } | grep -oE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9]+)?(_ptds|_ptsz)?[[:space:]]*\(' |
            tr -d ' (' | sort -u)
    printf '%s\n' "$names" | sed 's/.*/int &(void) { return 0; }/' > "$source"
    gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$toolkit/lib64/stubs/libcuda.so" "$source"
    ln -sf libcuda.so "$toolkit/lib64/stubs/libcuda.so.1"
    echo "driver stub: $(printf '%s\n' "$names" | wc -l) functions"
}

if [ ! -x "$toolkit/bin/nvcc" ] || [ ! -e "$toolkit/lib64/stubs/libcuda.so.1" ]; then
    mkdir -p "$base"
    python3 -m venv "$base/venv"
    "$base/venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
    lay_out "$("$base/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13"
    make_driver_stub
fi

export CUDA_HOME=$toolkit CUDA_PATH=$toolkit NVCC=$toolkit/bin/nvcc PATH=$toolkit/bin:$PATH
export LIBRARY_PATH=$toolkit/lib64:$toolkit/lib64/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target/cuda}
nvcc --version | tail -n 2
[ "$toolchain_only" = yes ] && exit 0

cargo build --locked "${profile[@]}" --features cuda
binary=$(cargo test --locked "${profile[@]}" --features cuda --test it --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
[ -x "$binary" ] || { echo "no test binary was built" >&2; exit 1; }

cat <<TEXT

The test binary: $binary
To run it on a machine with a GPU, copy it there together with tests/fixtures, sample-model and adapters, keeping these
at the same places below one folder, and in that folder run

  PATCHBAY_TEST_DEVICE=cuda ./$(basename "$binary") golden mixed

If the CUDA libraries are not in the system's path, LD_LIBRARY_PATH must name the folders of libcublas.so.13,
libcurand.so.10 and libnvrtc.so.13 (in a Python environment: .../site-packages/nvidia/*/lib).
TEXT
