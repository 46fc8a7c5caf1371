# The commands of MiniGPT-4 in an image, as a user without rights:
#   docker build -t minigpt4 .                             # for the CPU
#   docker build -t minigpt4:cuda --build-arg DEVICE=cuda .
#   docker run --rm -it -v "$PWD:/work" --user "$(id -u):$(id -g)" minigpt4 quickstart
#   docker run --rm -v "$PWD:/work" --gpus all --ipc host minigpt4:cuda train --cfg-path train_configs/FILE
#   docker run --rm -v "$PWD:/work" -p 8000:8000 minigpt4 serve --cfg-path FILE --host 0.0.0.0
# Several GPUs: --entrypoint torchrun, then --nproc-per-node N -m minigpt4 train ...
# Built by buildah for the CPU, on Debian bookworm's own Python as stand-in for the base image and a torch 2.13 from a file;
# neither by Docker nor for CUDA. Installed sizes by du, base apart: torch and torchvision 0.85 GB (CPU) or, counted in an
# environment, 5.9 GB (CUDA 13, torch 2.14.1); everything else 0.63 GB, with EXTRAS=serve 0.42 GB.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:${PYTHON}-slim-bookworm AS packages
ARG DEVICE=cpu
ARG EXTRAS=mini,eval,demo,serve
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/venv/bin:$PATH
RUN python -m venv /venv
# Of its own, for it is most of the image and seldom changes. The index of packages has the builds for CUDA; which
# versions go is said in pyproject.toml.
# hadolint ignore=DL3013
RUN case "$DEVICE" in \
        cpu) pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu ;; \
        cuda) pip install torch torchvision bitsandbytes ;; \
        *) echo "DEVICE is cpu or cuda, not $DEVICE" >&2; exit 2 ;; \
    esac
COPY --from=wheel /wheel /wheel
RUN pip install "$(echo /wheel/minigpt4_vlm-*.whl)[$EXTRAS]"

FROM python:${PYTHON}-slim-bookworm
# Whoever --user names has a home to write to; weights of the Hub go there, or to the folder of -e HF_HOME.
RUN useradd --create-home --uid 1000 minigpt4 && chmod 1777 /home/minigpt4 && mkdir /work && chown minigpt4 /work
COPY --from=packages /venv /venv
ENV PATH=/venv/bin:$PATH HOME=/home/minigpt4 PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
EXPOSE 7860 8000
ENTRYPOINT ["minigpt4"]
CMD ["--help"]
