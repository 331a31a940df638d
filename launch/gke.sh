#!/usr/bin/env bash
# Train on a TPU slice of Google Kubernetes Engine, as a JobSet with one pod a host:
#   ./launch/gke.sh run --config=... [--workdir=DIR] [--config.x.y=v]
#   ./launch/gke.sh status          the JobSet, its pods, and the last lines of the first pod
#   ./launch/gke.sh stop            delete the JobSet; its pods save on SIGTERM
# The cluster needs JobSet 0.6 or newer. The workdir is GKE_RUNS/NAME by default, with the config's
# NAME. GKE_CLAIM, if set, is mounted at /runs. If a pod is preempted or fails, all restart and
# resume, at most GKE_RESTARTS times. A mistake in the command or config (status 2) or a full disk
# (74) fails the JobSet. --dry-run prints commands and manifest. Settings: launch/env.example.
set -euo pipefail
cd "$(dirname "$0")/.."
verbs=(run status stop)
source launch/remote.sh
require GKE_CONTEXT GKE_NAME GKE_IMAGE GKE_ACCELERATOR GKE_TOPOLOGY GKE_CHIPS GKE_RESTARTS
[[ $GKE_TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
  fail "\`GKE_TOPOLOGY\` must be like 4x4 or 2x2x4, got \`$GKE_TOPOLOGY\`"
[[ $GKE_CHIPS =~ ^[1-9][0-9]*$ && $(((${GKE_TOPOLOGY//x/*}) % GKE_CHIPS)) == 0 ]] ||
  fail "\`GKE_CHIPS\` must divide the chips of \`GKE_TOPOLOGY\` $GKE_TOPOLOGY, got \`$GKE_CHIPS\`"
hosts=$(((${GKE_TOPOLOGY//x/*}) / GKE_CHIPS))
pods="--selector=jobset.sigs.k8s.io/jobset-name=$GKE_NAME"
kubectl=(kubectl "--context=$GKE_CONTEXT")

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $GKE_NAME
  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}
spec:
  failurePolicy:
    maxRestarts: $GKE_RESTARTS
    rules: [{action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}]
  replicatedJobs:
  - name: slice
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - {action: FailJob, onExitCodes: {containerName: train, operator: In, values: [2, 74]}}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $GKE_ACCELERATOR
              cloud.google.com/gke-tpu-topology: $GKE_TOPOLOGY
            tolerations: [{key: cloud.google.com/gke-spot, operator: Exists, effect: NoSchedule}]
            containers:
            - name: train
              image: $GKE_IMAGE
              command: [./launch/pod.sh]
              args:
$(for word in "$@"; do word=${word//\$/\$\$} && echo "              - '${word//\'/\'\'}'"; done)
              env: [$( ((hosts == 1)) || echo '{name: OPD_JAX_DISTRIBUTED, value: auto}')]
              resources: {limits: {google.com/tpu: $GKE_CHIPS}}
              volumeMounts: [${GKE_CLAIM:+{name: runs, mountPath: /runs\}}]
            volumes: [${GKE_CLAIM:+{name: runs, persistentVolumeClaim: {claimName: $GKE_CLAIM\}\}}]
YAML
}

case $verb in
  run)
    workdir_below GKE_RUNS "$@" && set -- "$@" ${workdir[@]+"${workdir[@]}"}
    if [[ -n $dry_run ]]; then
      echo "$(quoted "${kubectl[@]}" create --filename=-) <<'YAML'" && manifest "$@" && echo YAML
    else
      manifest "$@" | "${kubectl[@]}" create --filename=-
    fi
    ;;
  status)
    call "${kubectl[@]}" get jobset "$GKE_NAME"
    call "${kubectl[@]}" get pods "$pods" --output=wide
    call "${kubectl[@]}" logs "$pods,batch.kubernetes.io/job-completion-index=0" --tail=3
    ;;
  stop) call "${kubectl[@]}" delete jobset "$GKE_NAME" ;;
esac
