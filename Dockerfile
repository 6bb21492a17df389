# Needlestream with all its packages, built by steps of the Makefile. `docker run IMAGE TARGET` is `make TARGET`.
#
#   docker build -t needlestream .                       torch and DALI for CUDA 13, which run on a CPU too
#   docker build -t needlestream --build-arg CUDA=12 .   for NVIDIA drivers 525 to 579
#   docker build -t needlestream --build-arg CUDA=cpu --build-arg PIP_EXTRA_INDEX_URL=... .   (requirements-cpu.txt)
#   docker run --gpus all --ipc=host -v "$PWD/input:/needlestream/input:ro" -v "$PWD/shards:/needlestream/shards" \
#     -v "$PWD/runs:/needlestream/runs" needlestream infer
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG CUDA=13
ARG PIP_EXTRA_INDEX_URL
# torch.compile needs a compiler; Numba brings its own.
RUN apt-get update && apt-get install --yes --no-install-recommends make g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /needlestream
# Packages first, so that a change of the program does not install them again.
COPY Makefile requirements.txt requirements-cuda12.txt requirements-cpu.txt ./
ENV PIP_NO_CACHE_DIR=1
RUN make install CUDA=${CUDA}
COPY . .
ENTRYPOINT ["make"]
CMD ["help"]
