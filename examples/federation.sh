#!/usr/bin/env bash
# A federation on this machine by the six commands of offsite: a coordinator and three sites, as processes, over TLS.
#
#   examples/federation.sh FOLDER MODEL PUBLIC SITES
#
#   FOLDER   folder for everything, which must not be there yet
#   MODEL    the model's owner's model, a Hugging Face folder
#   PUBLIC   the model's owner's public text, a file or a folder
#   SITES    a folder with one entry for each data owner: a file, a folder, or a folder with a folder `train` inside;
#            the first three by name take part
#
# Between organisations the same six commands are typed in four places, and three small files and two fingerprints are
# carried between them. This script carries them, and compares the fingerprints as people would.
#
# Each site's policy permits this one model and one method, and asks its owner before a job runs: so the job waits until
# you have approved it, in another terminal, as each of the three owners. The environment gives further lines that an
# owner or the coordinator may write into their own files:
#
#   JOB              file with more lines for fed.toml, for example `training.rounds = 2`
#   POLICY           file that every owner takes as policy.toml
#   SIMULATION_SEED  noise from this seed, to repeat a run on invented data; it protects nobody, and the policy has to
#                    permit it
#   SPLIT            how texts become records; blocks, for folders of long texts
#   BLOCKS           number of blocks that each owner declares for the split blocks, at most as many as the texts make
#   LINK_PORT, DEPOT_PORT   ports on which the coordinator listens; 8443 and 8444 by default
set -euo pipefail

if [[ $# -ne 4 ]]; then
  sed -n '2,/^set /s/^#\( \|$\)//p' "$0" >&2
  exit 2
fi
mkdir -p "$(dirname "$1")"
mkdir "$1"
folder=$(realpath "$1") model=$(realpath "$2") public=$(realpath "$3") sites=$(realpath "$4")
split=${SPLIT:-blocks} blocks=${BLOCKS:-100}
link=${LINK_PORT:-8443} depot=${DEPOT_PORT:-8444}
mapfile -t entries < <(find "$sites" -mindepth 1 -maxdepth 1 ! -name '.*' | LC_ALL=C sort | head -n 3)
if [[ ${#entries[@]} -ne 3 ]]; then
  echo "SITES=$sites: holds ${#entries[@]} entries, three are needed" >&2
  exit 2
fi

running=()
stop() {
  for process in "${running[@]}"; do
    kill "$process" 2>/dev/null || true # it may have ended by itself
  done
  wait
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Prints the text that a command printed after a label, as people read it to each other by telephone.
printed() { sed -n "s/^$1: //p" "$2"; }

# 1, the coordinator: its authority, its keys, its ports
offsite coordinator init "$folder/home" --name example --host 127.0.0.1 --link-port "$link" --depot-port "$depot"

# 2, each site: its keys, which never leave, and its request
names=() requests=() fingerprints=()
for entry in "${entries[@]}"; do
  name=$(basename "$entry") && name=${name%%.*}
  [[ -d $entry/train ]] && entry=$entry/train
  offsite client init "$folder/$name" --name "$name" --data "$entry" | tee "$folder/$name.out"
  names+=("$name") requests+=("$folder/$name/site.request")
  fingerprints+=(--fingerprint "$(printed fingerprint "$folder/$name.out")")
done

# 3, the coordinator: admits the sites whose fingerprints it heard
offsite coordinator approve "$folder/home" "${requests[@]}" "${fingerprints[@]}" | tee "$folder/home.out"

# 4, each site: accepts the coordinator that read out this fingerprint, and signs the list of members and the terms
for name in "${names[@]}"; do
  offsite client sign "$folder/$name" "$folder/home/welcomes/$name.welcome" \
    --fingerprint "$(printed 'fingerprint for every site to compare' "$folder/home.out")"
done

# The lines that the four owners write into their own files.
cat >"$folder/fed.toml" <<TOML
model.path = '$model'
data.public = '$public'
coordinator.home = 'home'
data.split = '$split'
TOML
if [[ -n ${JOB:-} ]]; then cat "$JOB" >>"$folder/fed.toml"; fi
for name in "${names[@]}"; do
  policy=$folder/$name/policy.toml
  if [[ -n ${POLICY:-} ]]; then
    cat "$POLICY" >"$policy"
  else
    permitted=$(basename "$model")
    sed -i "s|^models = .*|models = ['$permitted']|; s|^methods = .*|methods = ['ffa_lora']|
      s|^splits = .*|splits = ['$split']|" "$policy"
  fi
  if [[ $split == blocks ]]; then sed -i "s|^blocks = .*|blocks = $blocks|" "$folder/$name/site.toml"; fi
  if [[ -n ${SIMULATION_SEED:-} ]]; then echo "simulation_seed = $SIMULATION_SEED" >>"$folder/$name/site.toml"; fi
done

# 5, each site: connects, and waits for a job
for name in "${names[@]}"; do
  offsite client run "$folder/$name" >"$folder/$name.log" 2>&1 &
  running+=($!)
done

if [[ -z ${POLICY:-} ]]; then
  echo "The job waits for the three owners. As each of them, once it is offered:"
  for name in "${names[@]}"; do
    echo "  look: offsite client inspect $folder/$name, again with the hash that it prints    agree: offsite client approve $folder/$name"
  done
fi

# 6, the coordinator: offers the job, runs it, and writes adapter and report
offsite coordinator run "$folder/fed.toml" --out "$folder/run" &
job=$!
running+=("$job")

wait -n "${running[@]}" || true # a site does not end by itself; if one has ended, the others would wait for it
if kill -0 "$job" 2>/dev/null; then
  echo "a site has ended; one of these logs says why:" >&2
  cd "$folder"
  tail -n 2 "${names[@]/%/.log}" >&2
  exit 1
fi
wait "$job"
echo "adapter: $folder/run/adapter"
