# The demo on a CPU: docker build -t padseg-demo . && docker run -p 127.0.0.1:7860:7860 -v padseg-data:/data padseg-demo
FROM python:3.12-slim
WORKDIR /src
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY padseg padseg
# Gradio needs Pillow < 13; OpenCV's build without windows needs no desktop libraries
RUN sed -i '/^pillow==13/d' constraints.txt \
 && pip install --no-cache-dir -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu \
 && pip install --no-cache-dir -c constraints.txt '.[demo]' \
 && pip install --no-cache-dir -c constraints.txt --no-deps --force-reinstall opencv-python-headless
RUN useradd --uid 1000 --home-dir /data --create-home padseg
USER padseg
WORKDIR /data
VOLUME /data
ENV HF_HOME=/data/huggingface PADSEG_CACHE=/data/cache
EXPOSE 7860
ENTRYPOINT ["padseg"]
# inside a container every address is the container's own: who reaches it is decided by `docker run -p`
CMD ["demo", "--model", "tiny", "--host", "0.0.0.0", "--public"]
