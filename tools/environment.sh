# Sourced by the tools: `environment FOLDER EXTRAS` makes or updates a virtual environment and returns at once when nothing changed.
environment() {
  local folder=$1 extras=$2 stamp
  stamp=$(cat pyproject.toml constraints-dev.txt <(echo "$extras") | sha256sum | cut -d' ' -f1)
  if [ -x "$folder/bin/onnxcomp" ] && [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ]; then
    return 0
  fi
  echo "Setting up $folder (once): onnxcomp[$extras] and what it needs" >&2
  "${PYTHON:-python3}" -m venv "$folder"
  # One line for each package that comes, with its size where pip tells; the whole output is shown when it fails.
  "$folder/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c constraints-dev.txt -e ".[$extras]" 2>&1 |
    tee "$folder/install.log" | sed -un \
      -e 's/^ *\(Downloading\|Using cached\) \([^ ]*\/\)\{0,1\}\([^ /]*\)-\([0-9][^-]*\)-[^ ]*\( (.*)\)*$/  fetching \3 \4\5/p' \
      -e 's/^ *Processing .*\/\([^ /]*\)-\([0-9][^-/]*\)-[^/]*\.whl.*$/  taking \1 \2/p' \
      -e 's/^Installing collected packages: .*/  installing them; this takes a minute/p' \
      -e 's/^Successfully installed .*/  done/p' >&2 ||
    { cat "$folder/install.log" >&2; return 1; }
  echo "$stamp" > "$folder/.stamp"
}
