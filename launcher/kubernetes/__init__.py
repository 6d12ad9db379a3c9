"""Jobs on Kubernetes: an Indexed Job, a JobSet or a Kubeflow TrainJob, all made of one job template.

    options   what the cluster is asked for          pod      one node of the job
    names     what Kubernetes takes for a name       job, jobset, trainjob    the three kinds
    around    the objects beside the job             plan     all of it, as one frozen value
    text      YAML that kubectl reads as it is meant backend  kubectl: submit, status, logs, cancel

Knows nothing of ssh and Slurm.
"""
