# vlmprune for a machine with an NVIDIA GPU. The machine gives Docker, NVIDIA's container toolkit and a driver for CUDA 13;
# PyTorch's own packages bring the rest of CUDA. Never built or run so far: it is linted, and what it has pip do was done by
# hand, without a GPU.
#
#   docker build -t vlmprune .
#   docker build -t vlmprune --build-arg VLMPRUNE_BUILD_CUDA=1 .    # with the CUDA C++ kernels
#   docker run --rm --gpus all vlmprune info                        # which backend each op uses
#   docker run --rm --gpus all -v "$PWD:/data" -v vlmprune-home:/home/vlmprune vlmprune \
#       run --model llava-hf/llava-1.5-7b-hf --image photo.jpg --prompt "Where is the dog?" --policy fastv:layer=2,keep=0.5
ARG VLMPRUNE_BUILD_CUDA=0

FROM python:3.12-slim-trixie AS base
ARG TORCH=2.13.0
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
# Triton compiles what launches its kernels with gcc, at the first use of each; the CUDA C++ kernels need g++.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# Alone: resolved together with the rest, pip may fetch several builds of gigabytes each.
RUN pip install "torch==${TORCH}"
WORKDIR /source

# The wheel without the CUDA C++ kernels ...
FROM base AS wheel-0
COPY . .
RUN pip wheel --no-deps -w /dist .

# ... and with them: nvcc comes from PyPI too, in the version of this PyTorch's CUDA.
FROM base AS wheel-1
RUN pip install "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*" "setuptools>=77"
ENV CUDA=/usr/local/lib/python3.12/site-packages/nvidia/cu13
ENV PATH=${CUDA}/bin:${PATH} LIBRARY_PATH=${CUDA}/lib
COPY . .
RUN VLMPRUNE_BUILD_CUDA=1 pip wheel --no-build-isolation --no-deps -w /dist .

# Only the one that is asked for is built.
# hadolint ignore=DL3006
FROM wheel-${VLMPRUNE_BUILD_CUDA} AS wheel

FROM base
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install "torch==${TORCH}" /dist/*.whl
RUN useradd --create-home --uid 1000 vlmprune
USER 1000
WORKDIR /data
ENTRYPOINT ["vlmprune"]
CMD ["info"]
