{{- define "turnout.name" -}}
{{- printf "%s-%s" .Release.Name "turnout" | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "turnout.labels" -}}
app.kubernetes.io/name: turnout
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end -}}

{{- define "turnout.selector" -}}
app.kubernetes.io/name: turnout
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "turnout.tag" -}}
{{- default .Chart.AppVersion .Values.image.tag -}}
{{- end -}}

{{/* What Pod Security's level "restricted" asks of a pod. */}}
{{- define "turnout.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "turnout.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end -}}

{{/* Keys in a Secret's volume are readable by the group; turnout wants them to be its own alone. */}}
{{- define "turnout.copyCertificates" -}}
command: ["sh", "-c", "install -m 0600 /secret/*.key /certs/ && install -m 0644 /secret/*.pem /certs/"]
securityContext:
  {{- include "turnout.containerSecurity" . | nindent 2 }}
resources:
  requests: {cpu: 10m, memory: 16Mi}
  limits: {memory: 64Mi}
volumeMounts:
  - {name: secret, mountPath: /secret, readOnly: true}
  - {name: certs, mountPath: /certs}
{{- end -}}
