{{/* The name of everything: the release's, so that two releases do not meet. */}}
{{- define "adapterd.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "adapterd.labels" -}}
app.kubernetes.io/name: {{ include "adapterd.name" . }}
{{- end }}

{{- define "adapterd.pickerLabels" -}}
app.kubernetes.io/name: {{ include "adapterd.name" . }}-picker
{{- end }}

{{- define "adapterd.metadata" -}}
name: {{ include "adapterd.name" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "adapterd.labels" . | nindent 2 }}
{{- end }}

{{- define "adapterd.pickerMetadata" -}}
name: {{ include "adapterd.name" . }}-picker
namespace: {{ .Release.Namespace }}
labels:
  {{- include "adapterd.pickerLabels" . | nindent 2 }}
{{- end }}

{{- define "adapterd.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" .Values.gpu.enabled)) }}
{{- end }}

{{- define "adapterd.settings" -}}
{{- range $name, $value := .Values.settings }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end }}
