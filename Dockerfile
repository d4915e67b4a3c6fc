# An image with trainer and the versions of constraints.txt. Build it in the repository:
#     docker build --tag trainer .                                  # CPU
#     docker build --tag trainer:gpu --build-arg EXTRAS=gpu,serve . # NVIDIA GPU, with CUDA's libraries
# and run it with a folder for data, runs and exported models that the user 1000 can write:
#     docker run --rm --volume "$PWD:/work" trainer fit
#     docker run --rm --volume "$PWD:/work" --gpus all trainer:gpu fit --device gpu
FROM python:3.12.12-slim-bookworm

ARG EXTRAS=serve
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /trainer
COPY . .
RUN pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && useradd --uid 1000 --create-home trainer \
    && install --directory --owner trainer /work

USER 1000
WORKDIR /work
ENTRYPOINT ["trainer"]
CMD ["--help"]
