# Prediction in a container. This file is not built by the project's tests: report what does not work.
#
#   docker build -t mstkd .
#   docker run --rm --gpus all --ipc=host --user "$(id -u)" -v MODEL:/model:ro -v IN:/in:ro -v OUT:/out \
#       mstkd -i /in -o /out -m /model -f 0
#
# MODEL is nnU-Net's folder TRAINER__PLANS__CONFIGURATION, OUT an existing folder; all three are absolute paths. torch
# brings its own CUDA libraries, so that the host needs only the NVIDIA driver and container toolkit. Without a GPU leave
# out --gpus and add "-device cpu". nnU-Net passes images between processes through shared memory, hence --ipc=host.
FROM python:3.12-slim

COPY pyproject.toml setup.py README.md LICENSE /source/
COPY nnunetv2_mstkd /source/nnunetv2_mstkd
COPY dataset_conversion /source/dataset_conversion
RUN pip install --no-cache-dir /source && rm -rf /source

# caches of matplotlib and torch; the user of --user has no home
ENV HOME=/tmp
ENTRYPOINT ["mstkd", "predict"]
