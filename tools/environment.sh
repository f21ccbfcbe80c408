# Sourced by the tools: `environment FOLDER EXTRAS` makes or updates a virtual environment and returns at once when nothing changed.
environment() {
  local folder=$1 extras=$2 stamp
  stamp=$(cat pyproject.toml constraints-dev.txt <(echo "$extras") | sha256sum | cut -d' ' -f1)
  if [ -x "$folder/bin/onnxcomp" ] && [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ]; then
    return 0
  fi
  echo "Setting up $folder (once)" >&2
  "${PYTHON:-python3}" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt -e ".[$extras]"
  echo "$stamp" > "$folder/.stamp"
}
