ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
RUN python -m venv /opt/adapterd
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY server ./server
RUN /opt/adapterd/bin/pip install --no-cache-dir --constraint constraints.txt '.[default-backbone,jwt]'

FROM ${BASE_IMAGE}
COPY --from=build /opt/adapterd /opt/adapterd
COPY adapters_store /var/lib/adapterd
# The store is a volume in any real deployment; uploads into it need the server's user to own it.
RUN useradd --system --uid 10001 adapterd && chown -R adapterd /var/lib/adapterd
# It listens to others, so it does not start without keys (ADAPTERD_API_KEYS_FILE or ADAPTERD_API_KEYS), unless
# ADAPTERD_INSECURE=true says that something in front asks who it is. See docs/security.md.
ENV PATH=/opt/adapterd/bin:${PATH} \
    ADAPTERD_HOST=0.0.0.0 \
    ADAPTERD_STORE=/var/lib/adapterd \
    ADAPTERD_LOG_FORMAT=json
USER adapterd
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["adapterd"]
CMD ["serve"]
